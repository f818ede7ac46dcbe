"""What images are made from, and checks of it and of what comes out."""
