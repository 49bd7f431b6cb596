// sm89_peak: the peak of E4M3 products (peak_mma.cuh): 16 x 8 x 32 each.

PEAK_MMA(sm89_peak, mma_e4m3)
