"""Names that settings may have, and a default; no imports, as flags list them without torch."""

# of the scheduler
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
LEARNED_VARIANCES = ("learned", "learned_range")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED_VARIANCES, "optimal")
# of training
OBJECTIVES = ("simple", "hybrid", "vlb")
WEIGHTINGS = ("none", "min_snr")
TIMESTEP_SAMPLINGS = ("uniform", "stratified", "loss_second_moment")
EVALUATIONS_PER_IMAGE = 12  # of the network, for bits/dim
