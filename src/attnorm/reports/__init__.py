"""What is written for people: the paper's tables with what was measured, pages about runs, figures."""
