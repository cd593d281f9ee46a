"""What all unit tests share: Hypothesis measures no time, for a busy machine is no fault of the code."""

from hypothesis import settings

settings.register_profile("untimed")
settings.load_profile("untimed")
