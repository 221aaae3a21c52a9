"""Where a run's numbers are shown: identity, one small protocol, trackers.

To add a tracker: a file here with a class that fits `base.Tracker`, one row in `base.TRACKERS`; the recipe key
`tracking.trackers` then takes its name, and tests/tracking/test_contract.py tests it. A tracker of a
third-party package is an entry point of the group `sousbatch.trackers`.
"""
