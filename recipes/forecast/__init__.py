"""Forecast what a plan takes: trained parameters, device memory, disk space."""
