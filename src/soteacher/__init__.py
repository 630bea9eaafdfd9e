"""Train teachers that teach: student-oriented teachers, knowledge distillation and honest statistics."""
