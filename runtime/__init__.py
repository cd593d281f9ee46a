"""How a patch meets a sampling run of a host."""
