"""What can be said of a teacher before any student is trained."""
