"""How good a model is: bits/dim, distances of samples from images, and the reports of both."""
