"""Number formats of V4's weights: FP8 (E4M3) and MXFP4 (E2M1), both with power-of-two (UE8M0) scales."""
