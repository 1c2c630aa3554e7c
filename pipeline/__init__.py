"""The batch system: Ray Data stages between a plan and a manifest. Runs the algorithm of `ditflow`."""
