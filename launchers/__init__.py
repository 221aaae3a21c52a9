"""HOW it runs: launchers, submission, the stage process and the states of stages."""
