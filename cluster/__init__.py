"""WHERE it runs: this machine, its devices, ranks and ports."""
