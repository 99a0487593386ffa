"""Four small models of WikiText-2 with the regularisers of AWD-LSTM, on equal terms, for two CPU cores."""
