"""Reports of running jobs: what a model runs with, what it has moved, and how both fit the prediction."""
