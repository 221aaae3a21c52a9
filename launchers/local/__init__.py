"""Run jobs as processes that share this machine's cores, memory and devices."""
