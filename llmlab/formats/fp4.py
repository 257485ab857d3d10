"""Four-bit floating point: a table of 16 values and a scale for each small group.

MXFP4 (OCP Microscaling): 32 weights and one power-of-two byte. NVFP4: 4 groups of 16 weights, one
E4M3 byte each. NF4 and FP4 are bitsandbytes' own: 64 weights and one float32 maximum; it keeps the
maxima in a tensor of their own, so a "block" here is a sum of bytes, not a layout on disk.
"""

from .registry import register

MXFP4 = register("MXFP4", 39, 32, 1 + 16, "fp4")
NVFP4 = register("NVFP4", 40, 64, 4 + 32, "fp4")
NF4 = register("NF4", None, 64, 4 + 32, "fp4")
FP4 = register("FP4", None, 64, 4 + 32, "fp4")
