"""The templates, one file for each: a demo and its twin for a checkpoint are the same graph."""
