"""An engine that computes nothing: a scheduler and a timing profile, for scale, timing and faults."""
