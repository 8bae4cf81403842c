"""Many runs side by side: a grid of variants and seeds, compared at equal honest bytes."""
