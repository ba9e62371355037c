"""TorchServe with its batching, a worker for each core."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ts.model_server import start

from deploy.peers.network import MOST_IMAGES, WORKERS

HANDLER = Path(__file__).with_name("torchserve_handler.py")
SETTINGS = f"""
inference_address=http://127.0.0.1:{{port}}
management_address=http://127.0.0.1:{{management}}
metrics_address=http://127.0.0.1:{{metrics}}
disable_token_authorization=true
disable_system_metrics=true
load_models=classify.mar
models={{{{"classify": {{{{"1.0": {{{{"defaultVersion": true, "marName": "classify.mar", \\
  "minWorkers": {WORKERS}, "maxWorkers": {WORKERS}, \\
  "batchSize": {MOST_IMAGES}, "maxBatchDelay": 1, "responseTimeout": 120}}}}}}}}}}}}
"""


def main() -> None:
    """Serve until told to stop."""
    if shutil.which("java") is None:
        sys.exit("TorchServe needs Java, which is not installed")
    port = int(os.environ["PEER_PORT"])
    with tempfile.TemporaryDirectory() as folder:
        archiver = Path(sys.executable).with_name("torch-model-archiver")
        words = ["--model-name", "classify", "--version", "1.0", "--handler", str(HANDLER)]
        subprocess.run([archiver, *words, "--export-path", folder], check=True)
        settings = Path(folder, "config.properties")
        settings.write_text(SETTINGS.format(port=port, management=port + 1, metrics=port + 2))
        os.environ["LOG_LOCATION"] = os.environ["METRICS_LOCATION"] = folder
        sys.argv = ["torchserve", "--start", "--foreground", "--disable-token-auth"]
        sys.argv += ["--ncs", "--model-store", folder, "--ts-config", str(settings)]
        start()


if __name__ == "__main__":
    main()
