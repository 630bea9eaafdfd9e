"""An example: a distillation method added to soteacher from another package."""
