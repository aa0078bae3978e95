"""The Ray Serve policy that turns forecasts into replica counts; thin, over app.cost."""
