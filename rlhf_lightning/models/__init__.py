"""Networks: how they are loaded or built, and the wrappers whose forward does all that training needs."""
