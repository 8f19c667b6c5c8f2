"""What the three labs share. Flat: one subject a module, nothing imported until it is asked for."""

import logging
import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported, so set before
# It says at import which of its kernels a processor has; PEFT imports it wherever it is installed.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
