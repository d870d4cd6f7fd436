"""`make gpu`: tests, speed and accuracy on this machine's GPU in a few minutes; a check cut off leaves what is done."""
