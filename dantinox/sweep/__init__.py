"""Many runs of one file: `file` reads it, `distributions` draws its values, `report` tells what came out."""
