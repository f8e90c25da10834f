"""What the unit tests share: Hypothesis without a deadline, as a busy machine may take long over any example."""

from hypothesis import settings

settings.register_profile("unit", deadline=None)
settings.load_profile("unit")
