"""All cases of test_cuda_ops.py, each by the module that makes it one."""

import cuda_attention_child
import cuda_decode_child
import cuda_device_child
import cuda_flat_child
from cuda_child import CASES, serve

MODULES = cuda_attention_child, cuda_decode_child, cuda_device_child, cuda_flat_child
__all__ = ["CASES", "MODULES", "serve"]
