"""The steps of the line. Each folder is one stage; none imports another."""
