"""What slides are labelled with: one file per kind of supervision, and what several kinds share."""
