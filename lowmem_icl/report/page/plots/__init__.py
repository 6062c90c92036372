"""What the page draws: Bokeh figures whose sources its script fills."""
