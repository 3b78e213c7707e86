"""Reports: routing logs, evaluation files, comparisons of runs, and pages of runs and stages."""
