"""Deployments over Flower as an operator starts them: `privfed serve` and `privfed join`, and what they set up."""
