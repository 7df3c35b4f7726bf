"""Models of transformers and peft, and everything that computes with them."""

import logging

# peft loads bitsandbytes wherever it is installed, which then asks aloud for kernels that it does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
