"""Coming over: another trainer's settings in our words, and what can't be said in them."""
