"""Judging scores and circuits: faithfulness, completeness, ROC, agreement, stability, exact effects."""
