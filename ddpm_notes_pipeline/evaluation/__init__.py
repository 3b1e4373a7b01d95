"""How good a model is: bits/dim, distances between samples and images, and the tables and pictures of both."""
