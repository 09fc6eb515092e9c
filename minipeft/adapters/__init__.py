"""What every adapter is, has and is called; no layer and no algorithm."""
