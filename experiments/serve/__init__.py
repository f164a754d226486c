"""An HTTP server for a trained model, with the fields of OpenAI's completions."""
