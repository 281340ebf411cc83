"""The referee: sets what attacks got against what the ledger claims."""
