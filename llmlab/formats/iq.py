"""IQ formats (codes are indices into fixed grids) and the ternary TQ formats: super-blocks of 256, IQ4_NL of 32.

Block bytes are what the parts add up to: scale (2), grid indices and signs, block scales.
"""

from .registry import register

IQ2_XXS = register("IQ2_XXS", 16, 256, 2 + 64, "iq")
IQ2_XS = register("IQ2_XS", 17, 256, 2 + 64 + 8, "iq")
IQ3_XXS = register("IQ3_XXS", 18, 256, 2 + 64 + 32, "iq")
IQ1_S = register("IQ1_S", 19, 256, 2 + 32 + 16, "iq")
IQ4_NL = register("IQ4_NL", 20, 32, 2 + 16, "iq")
IQ3_S = register("IQ3_S", 21, 256, 2 + 64 + 32 + 8 + 4, "iq")
IQ2_S = register("IQ2_S", 22, 256, 2 + 64 + 16, "iq")
IQ4_XS = register("IQ4_XS", 23, 256, 2 + 2 + 128 + 4, "iq")
IQ1_M = register("IQ1_M", 29, 256, 32 + 16 + 8, "iq")
TQ1_0 = register("TQ1_0", 34, 256, 2 + 52, "ternary")
TQ2_0 = register("TQ2_0", 35, 256, 2 + 64, "ternary")
