"""Other people's files to and from parameter trees."""
