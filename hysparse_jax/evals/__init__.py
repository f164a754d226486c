"""What a trained model can do and what its oracle does: held-out loss, needles, selections."""
