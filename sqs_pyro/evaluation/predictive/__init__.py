"""What a posterior predictive distribution is worth: of classes, and of numbers."""
