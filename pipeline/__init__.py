"""The batch system: Ray Data stages between a plan and a manifest. Runs the algorithm of `ditflow`."""

import os

# Under `uv run` Ray would copy the working folder to every worker and start it through uv, which installs everything
# again. Workers have this package already, here from this environment, on other machines from their own. Ray reads
# both variables when it is imported.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Any call after its end would start Ray anew: a run that was stopped would hang in what its last steps do.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
