"""What the notes derive: the Gaussian chain, the 8-bit levels and the likelihood bound."""
