"""Rows of the data: reading them, finding their faults, generating them, and turning them into token ids."""
