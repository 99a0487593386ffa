"""Four small models of the Penn Treebank with the regularisers of AWD-LSTM, on equal terms, for two CPU cores."""
