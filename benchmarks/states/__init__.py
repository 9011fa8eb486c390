"""Hidden states of a language model: what its lm-head is given, saved for the benchmarks of the linear losses."""
