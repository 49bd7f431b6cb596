// sm80_peak: the peak of bf16 products (peak_mma.cuh): 16 x 8 x 16 each.

PEAK_MMA(sm80_peak, mma_bf16)
