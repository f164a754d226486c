"""What the reference implementations share."""
