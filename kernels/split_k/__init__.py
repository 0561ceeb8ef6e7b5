"""Products of a few rows with a large weight: the contraction is split over programs, which fill the GPU."""
